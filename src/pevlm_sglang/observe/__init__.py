"""What PEVLM did, seen from outside."""
