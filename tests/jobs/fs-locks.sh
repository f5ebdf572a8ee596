# Adds to a number in a file that another guest adds to as well, each time with the file locked.
mkdir /mnt/shared
mount -t virtiofs shared /mnt/shared
cd /mnt/shared
: >"here-$me"
# Both begin together.
while [ ! -e here-1 ] || [ ! -e here-2 ]; do sleep 0.02; done
cat >/tmp/locks.pl <<'PERL'
use strict;
use warnings;
use Fcntl qw(:DEFAULT :flock);
my ($me, $rounds) = @ARGV;
my %bsd = (take => LOCK_EX, try => LOCK_EX | LOCK_NB);
my %posix = (take => F_SETLKW, try => F_SETLK);
sub locked {
    my ($how, $file, $kind) = @_;
    return flock($file, $bsd{$kind}) if $how eq "bsd";
    my $whole = pack("s s x4 q q i x4", F_WRLCK, 0, 0, 0, 0);
    return fcntl($file, $posix{$kind}, $whole);
}
sub wait_for { my ($name) = @_; select(undef, undef, undef, 0.02) until -e $name; }
sub make { open(my $file, ">", $_[0]) or die "$_[0]: $!"; }
for my $how ("bsd", "posix") {
    for (1 .. $rounds) {
        open(my $lock, "+<", "lock") or die "lock: $!";
        locked($how, $lock, "take") or die "$how lock: $!";
        open(my $file, "+<", "number") or die "number: $!";
        my $number = <$file>;
        seek($file, 0, 0);
        print $file $number + 1, "\n";
        close($file) or die "number: $!";
        close($lock);
    }
    make("done-$how-$me");
    wait_for("done-$how-$_") for (1, 2);
    # One holds the lock; the other cannot have it at once, and gets it in the end.
    open(my $lock, "+<", "lock") or die "lock: $!";
    if ($me == 1) {
        locked($how, $lock, "take") or die "$how lock: $!";
        make("held-$how");
        wait_for("refused-$how");
    } else {
        wait_for("held-$how");
        die "both have the $how lock" if locked($how, $lock, "try");
        make("refused-$how");
        locked($how, $lock, "take") or die "$how lock: $!";
    }
    open(my $order, ">>", "order") or die "order: $!";
    print $order "$how $me\n";
    close($order);
    close($lock);
}
PERL
perl /tmp/locks.pl "$me" "$rounds"
cd /
umount /mnt/shared
