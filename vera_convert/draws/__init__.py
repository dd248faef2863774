"""What torch's generator drew for A and B, from NumPy alone; and which draw a stored pair is."""
