"""Numbers and structures of taps, bridges and vhost-net, by the names of the kernel's headers.

A test compares the numbers with the headers.

Source: Linux include/uapi/linux/{if,if_tun,sockios,vhost,vhost_types}.h
"""

import struct

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETTXFILTER = 0x400454D1
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
TUNSETQUEUE = 0x400454D9
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08
TUN_F_UFO = 0x10
TUN_F_USO4 = 0x20
TUN_F_USO6 = 0x40
TUN_FLT_ALLMULTI = 0x0001

# linux/sockios.h, linux/if.h
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCSIFMTU = 0x8922
SIOCBRADDIF = 0x89A2
IFF_UP = 0x1

# linux/vhost.h
VHOST_GET_FEATURES = 0x8008AF00
VHOST_SET_FEATURES = 0x4008AF00
VHOST_SET_LOG_BASE = 0x4008AF04
VHOST_SET_OWNER = 0xAF01
VHOST_SET_MEM_TABLE = 0x4008AF03
VHOST_SET_VRING_NUM = 0x4008AF10
VHOST_SET_VRING_ADDR = 0x4028AF11
VHOST_SET_VRING_BASE = 0x4008AF12
VHOST_GET_VRING_BASE = 0xC008AF12
VHOST_SET_VRING_KICK = 0x4008AF20
VHOST_SET_VRING_CALL = 0x4008AF21
VHOST_SET_VRING_ERR = 0x4008AF22
VHOST_NET_SET_BACKEND = 0x4008AF30

ifreq = struct.Struct("<16sH22x")
"""ifr_name, ifr_flags."""
vhost_vring_state = struct.Struct("<II")
"""index, num."""
vhost_vring_file = struct.Struct("<Ii")
"""index, fd; -1 for none."""
vhost_vring_addr = struct.Struct("<IIQQQQ")
"""index, flags, descriptors, used, available, log."""
vhost_memory = struct.Struct("<II")
"""nregions, padding; the regions follow."""
vhost_memory_region = struct.Struct("<QQQQ")
"""guest_phys_addr, memory_size, userspace_addr, flags."""
tun_filter = struct.Struct("<HH")
"""flags, count; as many addresses follow."""
