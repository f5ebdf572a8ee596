# Talks to a service of the host, then serves one connection from the host.
reply=$(echo "hello from the guest" | socat -t5 - VSOCK-CONNECT:2:1234)
[ "$reply" = "hello from the guest" ]
# Says "listening on" when it does.
socat -d -d VSOCK-LISTEN:5678 EXEC:cat
