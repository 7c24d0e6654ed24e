"""The agentx process: a sub-agent of the host's SNMP agent; no privileges, one socket."""
