"""Record routing from other programs: sequences in, an open-ended run out.

The sequences come from a user's own forward passes (`record`), a training run (`trainer`) or any program that has the
numbers (`writer`). A run is `running` until its last segment is marked as the last.
"""
