"""What every part stands on: errors of one line, files, command lines, random state, precision."""
