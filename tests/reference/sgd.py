"""The gradient itself."""


def direction(g, state):
    return g
