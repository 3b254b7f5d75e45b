"""The command line: a command a file; views of events in `views`."""
