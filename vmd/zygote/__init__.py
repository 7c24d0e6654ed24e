"""The zygote: holds /dev/kvm and forks what vmm asks for."""
