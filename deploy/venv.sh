#!/bin/sh
# Makes .venv with Debian's own Python and exactly the packages of requirements.lock.
#
# nbdkit embeds Debian's Python, so that one and no other (pyenv, conda, ...) builds
# the core and runs everything.  Nothing is done when .venv was finished for this very
# folder, Python, lock file and project file; the note that says so is written last, so
# a setup that was cut off starts again.
set -eu
cd "$(dirname "$0")/.."
exec 9<Makefile && flock 9 # one setup at a time

root=$(pwd -P)
python=/usr/bin/python3
note=.venv/zcache-setup
made_for=$(printf '%s\n%s\n' "$root" "$($python -V)")
made_from=$(sha256sum requirements.lock pyproject.toml deploy/venv.sh)

[ "$(cat $note 2>/dev/null || :)" != "$made_for
$made_from" ] || exit 0

# Another folder or another Python: scripts in .venv name the old one.
if [ "$(head -n 2 $note 2>/dev/null || :)" != "$made_for" ]; then
    echo "zcache: making .venv with $($python -V)"
    $python -m venv --clear .venv
fi
echo "zcache: installing the Python packages of requirements.lock"
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
pip install --quiet --require-hashes --only-binary :all: -r requirements.lock

# The tree itself: importable from everywhere, and the command `zcache`.  An editable
# install would compile the core a second time.
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$root" >"$site/zcache.pth"
cat >.venv/bin/zcache.new <<END
#!/bin/sh
'''exec' "$root/.venv/bin/python" "\$0" "\$@"
' '''
import sys

from plugin.cli import main

sys.exit(main())
END
chmod 755 .venv/bin/zcache.new
mv .venv/bin/zcache.new .venv/bin/zcache

printf '%s\n%s\n' "$made_for" "$made_from" >$note.new
mv $note.new $note
