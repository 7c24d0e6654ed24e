"""The process of one disk or network interface, by vhost-user."""
