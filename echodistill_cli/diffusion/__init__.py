"""The maths and the objects it acts on: schedule, text conditioning, the pair, sampling."""
