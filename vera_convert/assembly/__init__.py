"""Large files put together from ranges that are copied and blocks of rows that are computed."""
