"""The policies that Kairos is compared with: SGLang's orders, and policies by name."""
