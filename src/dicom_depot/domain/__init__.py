"""The vocabulary of the project: values, states and errors. Standard library only, no I/O."""
