"""Networks: teachers, students and what they share."""
