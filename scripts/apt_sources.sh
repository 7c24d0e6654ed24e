# shellcheck shell=sh
# Sourced by scripts that need the origin of this machine's packages.

# debian_source SUITE: print the URI of apt's entry for a suite, and its keyring: "URI<TAB>KEYRING".
# Reads both formats of apt. See sources.list(5).
debian_source() {
    codename=$1
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        awk -v want="$codename" '
            function flush() {
                if (uri != "" && found && enabled) {
                    print uri "\t" key; printed = 1
                }
                uri = ""; key = ""; found = 0; enabled = 1
            }
            BEGIN { enabled = 1 }
            /^#/ { next }
            /^[ \t]*$/ { flush(); next }
            tolower($1) == "uris:" { uri = $2 }
            tolower($1) == "signed-by:" { key = $2 }
            tolower($1) == "enabled:" { enabled = tolower($2) != "no" }
            tolower($1) == "suites:" { for (i = 2; i <= NF; i++) if ($i == want) found = 1 }
            END { flush() }
        ' "$file"
    done
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -e "$file" ] || continue
        awk -v want="$codename" '
            $1 == "deb" {
                key = ""; i = 2
                if ($2 ~ /^\[/) {
                    while (i <= NF) {
                        field = $i; gsub(/[][]/, "", field)
                        if (field ~ /^signed-by=/) key = substr(field, 11)
                        if ($i ~ /\]$/) { i++; break }
                        i++
                    }
                }
                if ($(i + 1) == want) print $i "\t" key
            }
        ' "$file"
    done
}
