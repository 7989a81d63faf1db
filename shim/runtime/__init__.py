"""The runtime core: bundle in, container out. Everything here runs in children that the supervisor forks."""
