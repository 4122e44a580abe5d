"""What compile_for.py is made of: chips to compile for, and reading the result."""
