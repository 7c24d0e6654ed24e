#!/bin/sh
# Install what the project's tests, demo and benchmarks need: Debian packages, then .venv.
#
# If everything is installed, it does nothing and needs no network. It installs packages as root, and
# otherwise names the missing ones. It does not install kernels for guests: tests/artifacts.py downloads
# them into a cache.
set -eu
cd "$(dirname "$0")/.."

# Each package, and its use.
packages='
    acpica-tools        iasl checks our ACPI tables
    binutils            assembles the self-test guest again and compares
    busybox-static      user space of guests and of the rig
    bzip2               unpacks a kind of kernel payload that the boot tests make
    ca-certificates     pip fetches over TLS
    cpio                reads the initramfs archives that we write
    dmidecode           reads our SMBIOS tables
    dpkg-dev            dpkg and its tools unpack kernel packages
    e2fsprogs           makes and checks file systems of guests
    ethtool             checksums and segments left to hardware, or not, in tests of networks
    fdisk               sfdisk partitions disks of guests
    fish                completes command lines, in its tests
    gcc                 compares our structures with <linux/kvm.h>
    gdb                 debugs guests, in tests
    git                 the tests ask which files belong to the tree
    grub-common         grub-mkrescue makes bootable discs
    grub-efi-amd64-bin  GRUB for UEFI
    grub-pc-bin         GRUB for BIOS
    iperf3              tests of networks, and their benchmark
    iproute2            ip lists interfaces of the daemon, in tests
    ipxe                a guest, on a disc
    isolinux            boots a disc
    kmod                modprobe and depmod find kernel modules in load order
    libc6-dev           gcc needs it
    linux-libc-dev      <linux/kvm.h>
    lz4                 makes kernel payloads for the boot tests
    make                runs the targets
    mandoc              checks the manual pages
    memtest86+          a guest
    mmdebstrap          makes Debian for guests
    mount               mounts a small file system that a test fills
    mtools              grub-mkrescue needs it; makes an EFI system partition
    nftables            NAT, forwarded ports and locked lladdrs of the daemon
    openssh-client      logs in to a guest of the tutorial, moves a VM
    openssh-server      accepts a VM that moves, in a test
    ovmf                UEFI firmware
    passt               user-mode networking of guests
    passwd              adds the user of the daemon
    procps              free, in the demo
    python3             runs everything
    python3-venv        makes .venv
    seabios             firmware
    systemd             runs the units of vmd
    snmp                snmpget and snmpwalk, for the tests of agentx
    snmpd               the SNMP agent that vmd connects to
    swtpm               a TPM for guests
    syslinux-common     isolinux needs it
    tcpdump             captures inside guests and outside, which are compared
    tpm2-tools          asks the TPM in a guest
    wget                the tutorial asks a web server in a guest
    xorriso             makes CD-ROM images
    xz-utils            makes kernel payloads for the boot tests
    zsh                 completes command lines, in its tests
    zstd                packs initramfs images
'
# They run the rig, check our disk images, and serve other ones.
qemu_packages='qemu-system-x86 qemu-utils'
qemu_minimum=1:10.0  # 7.2 loses interrupts under nested SVM and hangs

codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")

say() { printf 'setup: %s\n' "$*" >&2; }

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

qemu_is_new() {
    for package in $qemu_packages; do
        installed "$package" || return 1
        dpkg --compare-versions "$(dpkg-query -W -f '${Version}' "$package")" ge $qemu_minimum ||
            return 1
    done
}

. scripts/apt_sources.sh

add_backports() {
    suite=$codename-backports
    if [ -n "$(debian_source "$suite")" ]; then return; fi
    source=$(debian_source "$codename" | head -n 1)
    [ -n "$source" ] || { say "no apt source for $codename found: add $suite by hand"; exit 1; }
    uri=${source%%"	"*}
    key=${source#*"	"}
    say "adding the suite $suite"
    {
        printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$suite"
        [ -z "$key" ] || printf 'Signed-By: %s\n' "$key"
    } > "/etc/apt/sources.list.d/$suite.sources"
}

# True if the cache has kernels for guests, or apt knows some; Debian 12 has a second series in
# backports.
kernels_are_known() {
    cache=${VMM_CACHE:-$HOME/.cache/vmm-kvm-tests}/kernels
    [ -e "$cache/series" ] && [ -n "$(find "$cache" -maxdepth 1 -name '*-cloud')" ] && return
    apt-cache show linux-image-cloud-amd64 2>/dev/null | grep -q '^Version:' || return 1
    [ "$codename" != bookworm ] || [ -n "$(debian_source "$codename-backports")" ]
}

apt_get() {
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Acquire::Retries=3 \
        -o DPkg::Lock::Timeout=300 --no-install-recommends "$@" </dev/null
}

# A browser for the page of vmctl web, in its tests; a tree of the matrix goes without.
[ -n "${VMM_NO_CHROMIUM:-}" ] || packages="$packages
    chromium"

missing=
for package in $(printf '%s\n' "$packages" | awk 'NF { print $1 }'); do
    installed "$package" || missing="$missing $package"
done
wanted_qemu=
qemu_is_new || wanted_qemu=$qemu_packages
known=yes
kernels_are_known || known=
if [ -n "$missing$wanted_qemu" ] || [ -z "$known" ]; then
    if [ "$(id -u)" != 0 ]; then
        [ -z "$missing" ] || say "install as root:$missing"
        [ -z "$wanted_qemu" ] || say "install as root: $qemu_packages, 10.0 or newer (backports)"
        [ -n "$known" ] || say "run as root once: the package lists lack a kernel for guests"
        exit 1
    fi
    [ "$codename" != bookworm ] || add_backports
    apt_get update
    # shellcheck disable=SC2086 # a list of names
    [ -z "$missing" ] || apt_get install $missing
    if [ -n "$wanted_qemu" ]; then
        # shellcheck disable=SC2086 # a list of names
        if [ "$codename" = bookworm ]; then
            apt_get install -t "$codename-backports" $qemu_packages
        else
            apt_get install $qemu_packages
        fi
        qemu_is_new || { say "$qemu_packages: still older than $qemu_minimum"; exit 1; }
    fi
fi

# The user of the daemon's processes; in an installed package systemd-sysusers makes it.
if ! getent passwd _vmd >/dev/null; then
    [ "$(id -u)" = 0 ] || { say "add the user _vmd as root: useradd --system _vmd"; exit 1; }
    say "adding the user _vmd"
    group=--user-group
    if getent group _vmd >/dev/null; then group='--gid _vmd'; fi
    # shellcheck disable=SC2086 # two words
    useradd --system $group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin _vmd
fi

# The virtual environment: pinned and hashed wheels, then this tree in place, without dependencies.
# (For this one step pip fetches its build back end.) The distribution's interpreter comes first: it is
# built with profiles, and handles an exit in two thirds of the time of a plain build.
python=
for candidate in /usr/bin/python3 python3 python3.11 python3.12 python3.13 python3.14; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
        2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { say "no python3 of version 3.11 or newer"; exit 1; }
venv=.venv
stamp=$venv/.installed
locked=$(sha256sum requirements.lock)
project=$(pwd; sha256sum pyproject.toml)
if [ ! -x $venv/bin/python ] || ! $venv/bin/python -c '' 2>/dev/null; then
    say "making $venv"
    "$python" -m venv --clear $venv
fi
pip() { $venv/bin/python -m pip --disable-pip-version-check -q "$@" </dev/null; }
# Debian's venv brings setuptools, whose hook slows every start of the interpreter.
if [ -d "$(echo $venv/lib/python3*/site-packages)/setuptools" ]; then
    pip uninstall -y setuptools
fi
if [ "$(cat $stamp.lock 2>/dev/null)" != "$locked" ]; then
    say "installing the locked dependencies"
    pip install --require-hashes --no-deps -r requirements.lock
    echo "$locked" > $stamp.lock
fi
if [ "$(cat $stamp.project 2>/dev/null)" != "$project" ] ||
    [ ! -x $venv/bin/vmctl ] || [ ! -x $venv/bin/vmd ]; then
    say "installing the commands"
    pip install --no-deps --editable .
    echo "$project" > $stamp.project
fi
