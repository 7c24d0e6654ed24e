"""The local process: guests' DHCP, DNS and router advertisements; no privileges."""
