"""The command line: `main` finds the command, and each command is one module, imported only when it is asked for."""
