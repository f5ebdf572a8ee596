# Takes an address by DHCP and measures TCP both ways with the iperf3 server at $SERVER.
cat >/tmp/lease <<'LEASE'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
ip route add default via $router
LEASE
chmod +x /tmp/lease
ip link set eth0 up
udhcpc -i eth0 -n -q -s /tmp/lease
for direction in upload download; do
    case $direction in upload) option= ;; download) option=-R ;; esac
    iperf3 -c "$SERVER" -t 2 -f m $option >/tmp/report
    # The receiver's line, which counts only what arrived.
    rate=$(awk '/receiver/ { print $7 }' /tmp/report)
    [ "${rate%.*}" -gt 0 ]
    echo "result ${direction}_mbit $rate"
done
