#!/bin/sh
# The guest's part in a change of network: `sh -s -- STEP ...`, given to the guest agent on standard input, so any
# guest with iproute2 will do. BusyBox and Debian run it alike. Each step may come again and prints one JSON object.
#
# A PLACE is MAC,ADDRESS/PREFIX,SUBNET/PREFIX,GATEWAY: an interface of the guest and where it is at home. IPv4.
#
#   prepare NEW OLD MTU     NEW gets its address; each address leaves by its own interface; OLD serves as before
#   join NEW OLD SECONDS    tells every MPTCP peer of NEW, waits until all have joined there, then drops OLD
#   finish NEW OLD MTU      NEW serves alone; the interface of OLD waits, without address
#   take NEW [MAC]          NEW serves, whatever there was before, and the interface MAC waits: for a guest that is a copy
#   forget ADDRESS          ends the subflows to an address that a peer has left, where the peer has another
#   status                  interfaces, endpoints, subflows
#
# Without KVM each process that is started takes the guest some hundredths of a second, so as few are as can be.
set -u
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH LC_ALL=C

fail() { echo "$1" >&2; exit "${2:-1}"; }

# A shell of BusyBox takes its own applet for a bare `ip`.
ip=
for each in /usr/sbin/ip /sbin/ip /usr/bin/ip /bin/ip; do [ -x $each ] && ip=$each && break; done
[ -n "$ip" ] || fail 'the guest has no iproute2' 69

# place PREFIX WORD: sets PREFIX_device, _address, _prefix, _subnet, _gateway.
place() {
  case $2 in
    *[!0-9a-f:./,]* | *,*,*,*,*) fail "$2 is no place" 64 ;;
    ??:??:??:??:??:??,*/*,*/*,*) ;;
    *) fail "$2 is no place" 64 ;;
  esac
  mac=${2%%,*} rest=${2#*,}
  device=
  for file in /sys/class/net/*/address; do
    read -r each 2>/dev/null <"$file" && [ "$each" = "$mac" ] || continue
    device=${file%/address} device=${device##*/}
    break
  done
  [ -n "$device" ] || fail "no interface has the address $mac" 66
  eval "$1_device=\$device $1_address=\${rest%%/*} $1_with_prefix=\${rest%%,*}"
  rest=${rest#*,}
  eval "$1_subnet=\${rest%%,*} $1_gateway=\${rest#*,}"
}

table_of() { read -r index <"/sys/class/net/$1/ifindex" && table=$((1000 + index)); }

# by_source DEVICE ADDRESS SUBNET GATEWAY: what comes from ADDRESS leaves by DEVICE. Without it, replies leave by
# whichever interface the main table names first.
by_source() {
  table_of "$1"
  $ip -batch - <<END || fail "cannot route $3 by $1 and $4"
route replace $3 dev $1 src $2 table $table
route replace default via $4 dev $1 src $2 onlink table $table
END
  # It may be there.
  $ip rule add from "$2" lookup "$table" priority 1000 2>/dev/null ||
    $ip rule show | grep -qF "from $2 lookup $table" || fail "cannot route from $2"
}

set_kernel() { for file in $1; do [ ! -w "$file" ] || echo "$2" >"$file"; done; }

prepare() {
  # One interface must not answer ARP for the address of the other. One ADD_ADDR that is lost must not stall for 2 min.
  set_kernel /proc/sys/net/ipv4/conf/all/arp_announce 2
  set_kernel /proc/sys/net/ipv4/conf/all/arp_ignore 1
  set_kernel "/proc/sys/net/ipv4/conf/all/rp_filter /proc/sys/net/ipv4/conf/$new_device/rp_filter" 0
  set_kernel /proc/sys/net/mptcp/add_addr_timeout 1
  $ip mptcp limits set subflow 8 add_addr_accepted 8 2>/dev/null
  by_source "$old_device" "$old_address" "$old_subnet" "$old_gateway"
  $ip link set dev "$new_device" mtu "$1" up || fail "cannot set up $new_device"
  # What is left of a handoff that failed.
  $ip -o -4 address show dev "$new_device" scope global | while read -r _ _ _ stale _; do
    [ "$stale" = "$new_with_prefix" ] || $ip address del "$stale" dev "$new_device"
  done
  $ip address replace "$new_with_prefix" dev "$new_device" noprefixroute || fail "cannot take $new_address"
  by_source "$new_device" "$new_address" "$new_subnet" "$new_gateway"
  echo "{\"device\":\"$new_device\"}"
}

# CONNECTIONS MISSING PATHS: MPTCP connections with an established subflow, how many of them have none from ADDRESS,
# and where the subflows of these lead. A peer that has not been heard of for a minute is gone for good, and is not waited
# for: without a path its connection is dead there by now.
look_for() { # ADDRESS
  ss -tniOH state established 2>/dev/null | awk -v wanted="$1" '
    function silent(since) { return match($0, since ":[0-9]+") && substr($0, RSTART + 8, RLENGTH - 8) + 0 > 60000 }
    match($0, /token:[0-9a-f]*\([^)]*\)\/[0-9a-f]*/) {
      token = substr($0, RSTART, RLENGTH); sub(/.*\//, "", token)
      if ($0 ~ / backoff:/ && silent("lastrcv") && silent("lastack")) next
      split($3, here, ":"); all[token] = 1
      if (here[1] == wanted) there[token] = 1; else paths[token] = paths[token] $4 ","
    }
    END {
      for (token in all) { n++; if (!(token in there)) { missing++; list = list paths[token] } }
      print n + 0, missing + 0, list "."
    }'
}
endpoints_of() {
  $ip mptcp endpoint show 2>/dev/null | while read -r address _ id _; do
    [ "$address" != "$1" ] || echo "$id"
  done
}

# A peer tries an address once under one id: each time that it is told, seconds later, the id is another.
announce() {
  for id in $(endpoints_of "$new_address"); do $ip mptcp endpoint del id "$id"; done
  id=$(($(uptime) % 250 + 1))
  while $ip mptcp endpoint show id $id 2>/dev/null | grep -q .; do id=$((id % 250 + 1)); done
  $ip mptcp endpoint add "$new_address" dev "$new_device" id $id signal || fail "cannot announce $new_address"
}

# Only after all have joined elsewhere: a connection that is told to close its last subflow dies. Id 0 is the subflow
# that a connection began with, under whatever id its address goes by now.
drop_old() {
  for id in $(endpoints_of "$old_address"); do $ip mptcp endpoint del id "$id"; done
  $ip mptcp endpoint del id 0 "$old_address" 2>/dev/null
}

# Local and remote end of each subflow that has given up hope, while its connection has one that is well.
dead() {
  ss -tniOH 2>/dev/null | awk '
    match($0, /token:[0-9a-f]*\([^)]*\)\/[0-9a-f]*/) {
      token = substr($0, RSTART, RLENGTH); sub(/.*\//, "", token)
      if ($0 ~ / backoff:/) late[n++] = token " " $4 " " $5
      else if ($1 == "ESTAB") well[token] = 1
    }
    END { for (i = 0; i < n; i++) { split(late[i], part, " "); if (part[1] in well) print part[2], part[3] } }'
}
kill_subflow() { # LOCAL REMOTE
  ss -nK src "${1%:*}" sport = ":${1##*:}" dst "${2%:*}" dport = ":${2##*:}" >/dev/null 2>&1
}

uptime() { read -r seconds _ </proc/uptime; echo "${seconds%.*}"; }

join() {
  case $1 in '' | *[!0-9]*) fail "$1 is no time" 64 ;; esac
  began=$(uptime) told=-10 told_paths=
  while :; do
    read -r all missing paths <<END
$(look_for "$new_address")
END
    [ "$missing" -gt 0 ] || break
    now=$(uptime)
    [ $((now - began)) -lt "$1" ] || break
    # The kernel (6.1) says it on the oldest subflow. If that is one to where the device was before, nobody hears it.
    dead | while read -r local remote; do kill_subflow "$local" "$remote"; done
    # A device that comes to its own next network meanwhile has not heard it either.
    since=$((now - told))
    if [ $since -ge 4 ] || { [ $since -ge 1 ] && [ "$paths" != "$told_paths" ]; }; then
      announce
      told=$now told_paths=$paths
    fi
    sleep 0.1
  done
  if [ "$missing" -eq 0 ]; then
    dropped=true
    [ "$all" -eq 0 ] || drop_old
    # Later connections have it from their first packet.
    $ip route replace default via "$new_gateway" dev "$new_device" src "$new_address" onlink
  else
    dropped=false
  fi
  echo "{\"connections\":$all,\"joined\":$((all - missing)),\"dropped\":$dropped}"
}

finish() {
  $ip link set dev "$new_device" mtu "$1"
  $ip route replace "$new_subnet" dev "$new_device" src "$new_address"
  $ip route replace default via "$new_gateway" dev "$new_device" src "$new_address" onlink
  for id in $(endpoints_of "$old_address"); do $ip mptcp endpoint del id "$id"; done
  table_of "$old_device"
  while $ip rule del from "$old_address" lookup "$table" 2>/dev/null; do :; done
  $ip route flush table "$table" 2>/dev/null
  $ip address del "$old_with_prefix" dev "$old_device" 2>/dev/null
  # Other defaults of the guest (from its boot, with a metric) led through the interface that waits now.
  while $ip route del default dev "$old_device" 2>/dev/null; do :; done
  if [ -d /run/systemd/network ]; then
    printf '[Match]\nName=%s\n[Link]\nRequiredForOnline=no\n[Network]\nIgnoreCarrierLoss=5s\nAddress=%s\nGateway=%s\n' \
      "$new_device" "$new_with_prefix" "$new_gateway" >"/run/systemd/network/10-viper-$new_device.network"
    printf '[Match]\nName=%s\n[Link]\nRequiredForOnline=no\n[Network]\nLinkLocalAddressing=no\n' \
      "$old_device" >"/run/systemd/network/10-viper-$old_device.network"
  fi
  echo "{\"device\":\"$new_device\"}"
}

# clear DEVICE: no address, route or rule of ours is left of it.
clear() {
  table_of "$1"
  while $ip rule del lookup "$table" 2>/dev/null; do :; done
  $ip route flush table "$table" 2>/dev/null
  $ip -4 address flush dev "$1" scope global
}

take() {
  clear "$new_device"
  [ -z "${1-}" ] || { place idle "$1,0/0,0/0,0" && clear "$idle_device"; }
  $ip link set dev "$new_device" up
  $ip address add "$new_with_prefix" dev "$new_device" || fail "cannot take $new_address"
  $ip route replace default via "$new_gateway" dev "$new_device" onlink
  echo "{\"device\":\"$new_device\"}"
}

forget() {
  case $1 in *[!0-9.]* | '') fail "$1 is no address" 64 ;; esac
  for token in $(ss -tniOH dst "$1" 2>/dev/null | sed -n 's/.* token:[0-9a-f]*([^)]*)\/\([0-9a-f]*\)(.*/\1/p' | sort -u); do
    ss -tniOH state established not dst "$1" | grep -q "/$token(" || continue
    ss -tniOH dst "$1" | grep "/$token(" | while read -r _ _ _ local remote _; do kill_subflow "$local" "$remote"; done
  done
  echo '{}'
}

status() {
  printf '{"interfaces":['
  comma=
  for directory in /sys/class/net/*; do
    device=${directory##*/}
    [ "$device" != lo ] || continue
    addresses=$($ip -o -4 address show dev "$device" scope global | while read -r _ _ _ address _; do printf ',"%s"' "$address"; done)
    printf '%s{"name":"%s","mac":"%s","mtu":%s,"addresses":[%s]}' "$comma" "$device" \
      "$(cat "$directory/address")" "$(cat "$directory/mtu")" "${addresses#,}"
    comma=,
  done
  printf '],"endpoints":['
  $ip mptcp endpoint show 2>/dev/null | awk '{ printf "%s{\"address\":\"%s\",\"id\":%d}", (NR > 1 ? "," : ""), $1, $3 }'
  printf '],"subflows":['
  ss -tniOH state established 2>/dev/null | awk '
    match($0, /token:[0-9a-f]*\([^)]*\)\/[0-9a-f]*/) {
      token = substr($0, RSTART, RLENGTH); sub(/.*\//, "", token)
      printf "%s{\"local\":\"%s\",\"remote\":\"%s\",\"token\":\"%s\"}", (n++ ? "," : ""), $3, $4, token
    }'
  echo ']}'
}

case ${1-} in
  prepare | join | finish)
    [ $# -eq 4 ] || fail "$1 wants NEW OLD and a number" 64
    place new "$2" && place old "$3" && "$1" "$4"
    ;;
  take) place new "${2-}" && take "${3-}" ;;
  forget) forget "${2-}" ;;
  status) status ;;
  *) fail "unknown step '${1-}'" 64 ;;
esac
