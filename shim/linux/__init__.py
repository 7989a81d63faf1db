"""System calls, one wrapper each. Import the modules; this package re-exports nothing, so that an import costs what it uses."""
