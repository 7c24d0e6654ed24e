"""Programs of their own: a device served by vhost-user to any VMM."""
