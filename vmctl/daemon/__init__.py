"""The verbs that ask vmd."""
