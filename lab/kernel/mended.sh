# Copies the kernel's source and mends it: of a dma-buf of several ranges each is to follow the one before in the IO
# addresses (docs/upstream/linux-dma-buf-several-ranges.md). `$1` is the source's tree, `$2` where the copy is to be.
# Fails where the source has not the one line that is to be changed.
set -eu
file=drivers/dma-buf/dma-buf-mapping.c
faulty='\(phys_vec\[i\]\.paddr, \)0,$'
cp --archive --link "$1" "$2"
count=$(grep -c "$faulty" "$1/$file" || true)
if [ "$count" != 1 ]; then
    echo "$file: $count lines link a range at offset 0, not one; has this source the change already?"
    exit 1
fi
# Makes another file of it: the tree keeps its own.
sed -i "s/$faulty/\1mapped_len,/" "$2/$file"
# For the log.
diff -u "$1/$file" "$2/$file" || [ $? = 1 ]
