"""vm.conf(5): its model and its parser."""
