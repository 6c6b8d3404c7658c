"""The plain calls: arrays, one collective, agreed on by all ranks every time; and plans.

Names and order of arguments are those of MPI where it has them; what begins with i returns a request.
"""
