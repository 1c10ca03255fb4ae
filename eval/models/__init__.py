"""The small trained models that ship, and the seeded script that trains them."""
