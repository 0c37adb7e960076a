"""What happens between iterations."""
