"""The Container Device Interface: the node's files that say what a device by name means for a container (CDI specification 0.3 to 1.1)."""
