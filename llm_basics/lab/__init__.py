"""The lab: a local web server over run directories, to watch runs, generate text and inspect models."""
