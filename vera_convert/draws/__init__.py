"""Draw A and B as PyTorch draws them, and recognize a stored pair, with NumPy alone.

May import the ground alone.
"""
