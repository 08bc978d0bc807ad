"""Half an hour on a GPU: five parts of at most nine minutes each; see README.md beside this file."""
