"""``pevlm tune``: which setting of PEVLM a video question set can bear."""
