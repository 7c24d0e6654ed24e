"""A pytest plugin: a fresh virtual machine for each test. See docs/pytest.md."""
