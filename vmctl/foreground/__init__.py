"""`vmctl run`: a VM in this very process, without a daemon."""
