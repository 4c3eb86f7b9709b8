"""Which draft serves which target."""
