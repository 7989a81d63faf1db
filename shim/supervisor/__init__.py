"""The runtime core's process: parent and subreaper of every container, owner of pidfds, namespaces, cgroups and exits."""
