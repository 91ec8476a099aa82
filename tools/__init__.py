"""Programs for people who work in this repository. Nothing here is shipped."""
