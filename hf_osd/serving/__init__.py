"""The decode loop: propose, verify, commit. Knows nothing of learning."""
