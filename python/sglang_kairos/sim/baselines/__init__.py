"""What Kairos is compared with: upstream's orders, and policies by name."""
