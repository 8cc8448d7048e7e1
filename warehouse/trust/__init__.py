"""Trust: compares the files on disk with their manifests, and the rows with each other."""
