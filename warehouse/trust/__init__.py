"""Trust: what is on the disk against its manifests, and the rows against each other."""
