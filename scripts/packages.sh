# The Debian packages that Viper needs, for scripts/setup. Asks for programs, not for packages: programs that
# came another way are as good.

# missing_packages [GUEST...]: prints the packages that are needed and not there.
missing_packages() {
  set -- "$#"
  missing=
  need qemu-system-x86 qemu-system-x86_64
  need qemu-utils qemu-img
  need xorriso xorriso
  need iproute2 ip
  need iputils-ping ping
  need npm npm
  need procps sysctl
  need vde2 wirefilter
  need nftables nft
  need iputils-ping ping
  need mptcpize mptcpize
  need wireguard-tools wg
  need wireguard-go wireguard-go
  if [ -n "${browser:-}" ]; then
    need chromium chromium
    need libnss3-tools certutil
  fi
  if [ -n "${storage:-}" ]; then
    need nfs-ganesha ganesha.nfsd
    need nfs-ganesha-vfs "$(ls /usr/lib/*/ganesha/libfsalvfs.so 2>/dev/null | head -n 1)"
    need rpcbind rpcbind
    need glusterfs-server glusterd
    need qemu-block-extra "$(ls /usr/lib/*/qemu/block-nfs.so 2>/dev/null | head -n 1)"
  fi
  if [ "$1" != 0 ]; then
    need mmdebstrap mmdebstrap
    need debian-archive-keyring /usr/share/keyrings/debian-archive-keyring.gpg
    need cpio cpio
    need lz4 lz4
    need fdisk sfdisk
    need e2fsprogs mke2fs
    need grub-common grub-mkimage
    need grub-pc-bin /usr/lib/grub/i386-pc/boot.img
  fi
  case " $missing " in
    *' qemu-system-x86 '*) ;;
    *) ! qemu_is_unsafe || missing="qemu-system-x86 qemu-utils$missing" ;;
  esac
  echo $missing
}

need() { # PACKAGE PROGRAM
  command -v "$2" >/dev/null || [ -f "$2" ] || missing="$missing $1"
}

# QEMU 7.2 without hardware virtualisation (TCG) corrupts guests that write while they are migrated; 10.0 does not.
emulates() { ! grep -qwE 'vmx|svm' /proc/cpuinfo; }
is_too_old() { [ -n "$1" ] && [ "$1" -lt 8 ]; }
qemu_is_unsafe() {
  emulates && is_too_old "$(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\).*/\1/p')"
}

# install_packages PACKAGE...
install_packages() {
  export DEBIAN_FRONTEND=noninteractive
  # Sources of third parties may be broken. Whether the update brought what is needed, the installation tells.
  apt-get update || true

  candidate=$(apt-cache policy qemu-system-x86 | sed -n 's/ *Candidate: \([0-9]*:\)\{0,1\}\([0-9]*\).*/\2/p')
  suite=
  if emulates && is_too_old "$candidate"; then
    add_backports || return 1
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME-backports")
  fi

  # Only QEMU from there; the rest stays as stable as the machine is.
  qemu= others=
  for package; do
    case $package in
      # With QEMU's driver for it comes its library, which fits no other version of the server.
      qemu-* | glusterfs-*) qemu="$qemu $package" ;;
      *) others="$others $package" ;;
    esac
  done
  install='apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300'
  [ -z "$qemu" ] || $install ${suite:+-t "$suite"} $qemu || return 1
  [ -z "$others" ] || $install $others
}

# Debian's backports, from the mirror that the machine uses already.
add_backports() {
  source=$(scripts/debian-source archive) || {
    echo "QEMU $candidate is unsafe without hardware virtualisation, and apt here knows no Debian mirror to take"
    echo 'a newer one from: install QEMU 8 or newer by other means'
    return 1
  }
  keyring=${source#* }
  [ "$keyring" = - ] && signed_by= || signed_by="
Signed-By: $keyring"
  cat >/etc/apt/sources.list.d/viper-backports.sources <<END
# Viper: QEMU 7.2 corrupts guests that migrate without hardware virtualisation. Written by scripts/setup.
Types: deb
URIs: ${source% *}
Suites: $(. /etc/os-release && echo "$VERSION_CODENAME")-backports
Components: main$signed_by
END
  apt-get update || true
}
