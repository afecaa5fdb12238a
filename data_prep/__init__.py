"""Raw preference data to the standard records of the course.

This package imports nothing of `rlhf_guide`: it can be used alone.
"""
