"""Durable execution on DBOS: when the steps of an operation run, and who goes on when a process dies."""
