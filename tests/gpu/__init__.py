"""What only a GPU can tell: `python -m tests.gpu` there, from a bare checkout; pytest collects nothing here.

One runner, without pytest: the machines with a GPU have torch and Triton, and often nothing else.
"""
