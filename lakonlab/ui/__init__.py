"""What people look at: the digits demo and its report."""
