"""The commands of the command line, by theme; cli.py puts them together. Heavy imports happen inside commands."""
