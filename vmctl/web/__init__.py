"""`vmctl web`: a page in the browser, and the control protocol over HTTP, for the caller alone."""
